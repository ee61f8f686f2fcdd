"""The API's documentation as a plain page, for where Swagger UI is not installed: no script, nothing from another host.

In: an OpenAPI description. Out: HTML. Knows nothing of servers.
"""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping
from typing import Any

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "code,pre{font:13px/1.45 ui-monospace,monospace}pre{background:#f5f5f5;padding:.7rem;overflow:auto}"
    "h2{border-top:1px solid #ddd;padding-top:1rem}summary{cursor:pointer}table{border-collapse:collapse}"
    "td{padding:.1rem 1rem .1rem 0;vertical-align:top}"
)
_METHODS = ("get", "post", "put", "delete")


def api_page(description: Mapping[str, Any]) -> str:
    """The page of an OpenAPI description: each call with its parameters, body, responses and a line of curl."""
    info = description["info"]
    title = html.escape(f"{info['title']} {info['version']}")
    return "".join(
        (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>',
            f"<p>{html.escape(info.get('description', ''))}</p>",
            '<p>The same for programs: <a href="openapi.json">openapi.json</a>. <a href="./">Try it</a>.</p>',
            *_calls(description),
            "<h2>Schemas</h2>",
            *_schemas(description),
        )
    )


def _calls(description: Mapping[str, Any]) -> Iterator[str]:
    for path, methods in description["paths"].items():
        for method in filter(methods.__contains__, _METHODS):
            call = methods[method]
            yield f"<h2><code>{method.upper()} {html.escape(path)}</code></h2><p>{html.escape(call.get('summary', ''))}</p>"
            for parameter in call.get("parameters", ()):
                where = html.escape(f"{parameter['name']} ({parameter['in']})")
                yield f"<p><code>{where}</code> {html.escape(parameter.get('description', ''))}</p>"
            content = call.get("requestBody", {}).get("content", {}).get("application/json")
            if content is not None:
                yield f"<details><summary>Body</summary>{_json(content['schema'])}</details>"
            yield f"<pre>{html.escape(_curl(method, path, content is not None))}</pre><table>"
            for status, response in call.get("responses", {}).items():
                yield f"<tr><td><code>{html.escape(str(status))}</code><td>{html.escape(response.get('description', ''))}"
            yield "</table>"


def _schemas(description: Mapping[str, Any]) -> Iterator[str]:
    for name, schema in description.get("components", {}).get("schemas", {}).items():
        yield f"<details><summary><code>{html.escape(name)}</code></summary>{_json(schema)}</details>"


def _curl(method: str, path: str, has_body: bool) -> str:
    """`$URL`: where the server is reached."""
    body = " -H 'content-type: application/json' -d '{...}'" if has_body else ""
    return f'curl{"" if method == "get" or has_body else f" -X {method.upper()}"} "$URL{path}"{body}'


def _json(value: Any) -> str:
    return f"<pre>{html.escape(json.dumps(value, indent=2, ensure_ascii=False))}</pre>"
