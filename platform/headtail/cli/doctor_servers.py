"""The servers that a pipeline talks to: an endpoint that answers as teacher, the model hub, the tracking server, the cluster.

In: a model's config, a pipeline's config, the environment. Out: Findings, each with its cure. Every server gets one or two small
requests with a time limit; nothing is downloaded and nothing is written to a server.
"""

from __future__ import annotations

import difflib
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from headtail.adapters.proxies import may_proxy
from headtail.adapters.tracking import tracking_uri
from headtail.cli.finding import Finding, check_result, error_finding
from headtail.core.errors import HeadtailError
from headtail.engines import ModelConfig
from headtail.pipeline import Config

if TYPE_CHECKING:
    import httpx

TIMEOUT_S = 10.0
HUB = "https://huggingface.co"
_SQLITE = "sqlite:///"


def endpoint(model: ModelConfig, role: str) -> Finding:
    """Whether an OpenAI-compatible endpoint answers with this key and has this model."""
    import httpx

    from headtail.engines.openai import check_url, key_for

    try:
        check_url(model.base_url)
        key = key_for(model)
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        with httpx.Client(headers=headers, timeout=TIMEOUT_S, trust_env=may_proxy(model.base_url)) as http:
            return _judge_endpoint(http, model, role, bool(key))
    except HeadtailError as error:
        return error_finding(role, error)
    except httpx.HTTPError as error:
        return Finding(role, "bad", f"{model.base_url}: {error}", "check model.base_url and the network")


def _judge_endpoint(http: httpx.Client, model: ModelConfig, role: str, has_key: bool) -> Finding:
    """By the status of GET /models, and by whether its list has the model."""
    url = model.base_url.rstrip("/")
    answer = http.get(f"{url}/models")
    status, said = answer.status_code, f"{url}/models answers {answer.status_code}"
    if status == 200:
        return _judge_models(http, answer, model, role)
    if 300 <= status < 400:
        fix = "set model.base_url to the final address; redirects are not followed, because the key would be sent along"
        return Finding(role, "bad", f"{said}: it redirects to {answer.headers.get('location', 'nowhere')}", fix)
    if status == 401:
        fix = "check OPENAI_API_KEY in the environment" if has_key else "export OPENAI_API_KEY: this endpoint asks for a key"
        return Finding(role, "bad", said, fix)
    if status == 403:
        fix = "the key in OPENAI_API_KEY may not list models: check with the provider that it may use this one"
        return Finding(role, "warn", said, fix)
    if status == 404 and http.get(f"{url}/chat/completions").status_code != 404:
        return Finding(role, "warn", f"{said}: it lists no models", f"check by yourself that it has {model.model}")
    if status == 402:
        return Finding(role, "bad", said, "the key's account has no money left: add some")
    if status == 429:
        return Finding(role, "warn", said, "too many requests, or no quota left: look at the provider's page of usage")
    if status >= 500:
        return Finding(role, "bad", said, "the server has a fault of its own: look at its log, or try again later")
    return Finding(role, "bad", said, "check model.base_url: it is the address before /chat/completions, and ends in /v1 for most servers")


def _judge_models(http: httpx.Client, answer: httpx.Response, model: ModelConfig, role: str) -> Finding:
    """Whether a list of models has this one. A list may be shorter than what the endpoint knows: a model has an address of its own."""
    url = model.base_url.rstrip("/")
    try:
        names = [str(one["id"]) for one in answer.json()["data"]]
    except (ValueError, KeyError, TypeError):
        return Finding(role, "bad", f"{url}/models answers 200 without a list of models", "check model.base_url: another server is there")
    if model.model in names or http.get(f"{url}/models/{quote(model.model, safe='/')}").status_code == 200:
        return Finding(role, "ok", f"{model.base_url}: {model.model}")
    near = difflib.get_close_matches(model.model, names, n=1) or names[:3]
    fix = f"set model.model to a name that it lists: {', '.join(near)}" if near else "load the model there; it lists none"
    return Finding(role, "bad", f"{url}/models does not list {model.model}", fix)


def hub(model: str, revision: str, check: str) -> Finding:
    """Whether a hub model can be loaded: from this machine's hub cache, else from the hub."""
    import httpx
    from huggingface_hub import get_token, try_to_load_from_cache

    name = f"{model} at {revision[:12]}"
    elsewhere = f"or fetch it elsewhere (hf download {model} --revision {revision}) and name the folder as model"
    if isinstance(try_to_load_from_cache(model, "config.json", revision=revision), str):
        return Finding(check, "ok", f"{name} is in this machine's hub cache")
    if os.environ.get("HF_HUB_OFFLINE", "").lower() in ("1", "true", "yes", "on"):
        return Finding(check, "bad", f"{name} is not in the hub cache, and HF_HUB_OFFLINE is set", f"unset HF_HUB_OFFLINE, {elsewhere}")
    server = os.environ.get("HF_ENDPOINT") or HUB
    token = get_token()
    headers = {"Authorization": f"Bearer {token}"} if token and server.startswith("https://") else {}
    try:
        url = f"{server.rstrip('/')}/api/models/{model}/revision/{revision}"
        code = httpx.get(url, headers=headers, timeout=TIMEOUT_S, trust_env=may_proxy(server), follow_redirects=True).status_code
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        fix = f"set HTTPS_PROXY, or HF_ENDPOINT to a mirror, {elsewhere}"
        return Finding(check, "bad", f"{name}: the hub {server} cannot be reached: {error}", fix)
    if code in (401, 403):
        fix = "check the id; for a private or gated model accept its terms on the hub and export HF_TOKEN"
        return Finding(check, "bad", f"{name}: the hub {server} answers {code}", fix)
    if code == 404:
        return Finding(check, "bad", f"{name}: the hub {server} has no such model or commit", "check model and revision on the hub's page")
    return check_result(
        check, code == 200, f"{name} is on the hub {server}" if code == 200 else f"{name}: {server} answers {code}", "try again later"
    )


def tracking(config: Config) -> Iterator[Finding]:
    """A tracking server that does not answer stops no job, but its runs are then in the store alone."""
    if not config.tracking.enabled:
        yield Finding("tracking", "ok", "off (tracking.enabled=false); receipts are in the store")
        return
    uri = tracking_uri(config.tracking, config.root)
    problem = _server(uri) if uri.startswith(("http://", "https://")) else _database(uri)
    if uri.startswith(("http://", "https://")):
        fix = "start the server, or check tracking.uri and $MLFLOW_TRACKING_URI; jobs run without it, their receipts are in the store"
    else:
        fix = "free or repair that file, or set tracking.uri; jobs run without it, their receipts are in the store"
    yield Finding("tracking", "warn" if problem else "ok", f"{uri}: {problem}" if problem else uri, fix if problem else "")


def _server(uri: str) -> str:
    """What is wrong with an MLflow server; empty when nothing is."""
    import httpx

    try:
        answers = [
            httpx.get(f"{uri.rstrip('/')}{path}", timeout=TIMEOUT_S / 2, trust_env=may_proxy(uri))
            for path in ("/health", "/api/2.0/mlflow/experiments/get?experiment_id=0")
        ]
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        return str(error)
    health, experiment = answers
    if health.status_code != 200:
        return f"/health answers {health.status_code}"
    if experiment.status_code in (401, 403):
        return f"it refuses this user ({experiment.status_code}): export MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or a token"
    if "json" not in experiment.headers.get("content-type", ""):
        return "it does not speak MLflow's API: this address belongs to another server"
    return ""


def _database(uri: str) -> str:
    """What is wrong with MLflow's SQLite file; empty when nothing is, or there is no file yet."""
    if not uri.startswith(_SQLITE):
        return ""  # another database: MLflow itself says what is wrong
    path = Path(uri.removeprefix(_SQLITE))
    if not path.exists():
        above = next(folder for folder in path.absolute().parents if folder.exists())
        return "" if os.access(above, os.W_OK) else f"no permission to write in {above}"
    if not os.access(path, os.W_OK):
        return "no permission to write this file"
    try:
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=1) as database:
            database.execute("select name from sqlite_master limit 1").fetchone()
    except sqlite3.Error as error:
        return f"not a database that can be read: {error}"
    return ""


def cluster() -> Iterator[Finding]:
    """Whether jobs that go to a cluster carry its token."""
    address, mode = os.environ.get("RAY_ADDRESS"), os.environ.get("RAY_AUTH_MODE")
    if not address:
        yield Finding("cluster", "ok", "no RAY_ADDRESS: a local cluster is started in this process")
    elif mode != "token":
        yield Finding(
            "cluster",
            "warn",
            f"{address} without RAY_AUTH_MODE=token",
            "anyone who reaches the dashboard port can run code: export RAY_AUTH_MODE=token and RAY_AUTH_TOKEN",
        )
    else:
        known = bool(
            os.environ.get("RAY_AUTH_TOKEN")
            or os.environ.get("RAY_AUTH_TOKEN_PATH")
            or os.path.exists(os.path.expanduser("~/.ray/auth_token"))
        )
        fix = "export RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH"
        yield check_result("cluster", known, f"{address}, token {'found' if known else 'missing'}", fix, otherwise="bad")
