"""API keys: what the file holds, who is let in, rotation and revocation under a running reader, and the commands."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from headtail.cli import main
from headtail.core.errors import ConfigError
from headtail.stages.serve import api_keys
from headtail.stages.serve.api_keys import KeyRing, add_key, parse_rate, read_keys, revoke_key, rotate_key
from headtail.stages.serve.errors import RequestError
from timescale import limit


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def bearer(key: str) -> bytes:
    return f"Bearer {key}".encode()


def ring(file: Path) -> KeyRing:
    return KeyRing(file, look_every_s=0)


def refusal(keys: KeyRing, header: bytes | None, scope: str = "answer") -> RequestError:
    with pytest.raises(RequestError) as caught:
        keys.check(header, scope)
    return caught.value


def test_a_key_opens_what_its_scopes_say(file: Path) -> None:
    search, admin = add_key(file, "search", ["answer"], parse_rate("100/s"), 200), add_key(file, "ops", ["answer", "admin"])
    keys = ring(file)
    held = keys.check(bearer(search), "answer")
    assert (held.name, held.interval, held.burst) == ("search", 0.01, 200)
    assert keys.check(bearer(admin), "admin").name == "ops"
    assert keys.check(bearer(admin), "admin").interval == 0
    assert held.slot != keys.check(bearer(admin), "admin").slot
    assert keys.check(b"bEaReR  " + search.encode() + b" ", "answer").name == "search"
    assert refusal(keys, bearer(search), "admin").status == 403


def test_the_file_holds_no_key_and_is_its_owners_alone(file: Path) -> None:
    keys = [add_key(file, f"k{number}", ["answer"]) for number in range(3)]
    text = file.read_text()
    assert not [key for key in keys if key in text or key.removeprefix("htk_") in text]
    assert len(set(keys)) == 3
    assert all(len(key) > 40 for key in keys), "256 bits"
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_wrong_key_is_refused_without_a_hint(file: Path) -> None:
    key = add_key(file, "search", ["answer"])
    add_key(file, "old", ["answer"], until="2020-01-01T00:00:00+00:00")
    keys = ring(file)
    wrong = [None, b"", b"Bearer ", b"Basic " + key.encode(), key.encode(), bearer(key + "x"), bearer(key[:-1]), bearer(key.upper())]
    wrong += [bearer("x" + key[1:]), bearer(key[:-1] + ("a" if key[-1] != "a" else "b")), b"Bearer " + b"\xff" * 100, b"Bearer " * 10**5]
    bodies = {refusal(keys, header).body("r") for header in wrong}
    assert len(bodies) == 1
    assert refusal(keys, None).headers == [("www-authenticate", "Bearer")]


def test_an_ended_key_is_refused_as_an_unknown_one(file: Path) -> None:
    key = add_key(file, "old", ["answer"], until="2020-01-01T00:00:00+00:00")
    assert refusal(ring(file), bearer(key)).body("r") == refusal(ring(file), b"").body("r")


def test_a_digest_is_bound_to_the_salt_of_its_file(tmp_path: Path) -> None:
    key = add_key(tmp_path / "one", "a", ["answer"])
    add_key(tmp_path / "two", "b", ["answer"])
    stolen = json.loads((tmp_path / "one").read_text())["keys"]
    other = json.loads((tmp_path / "two").read_text()) | {"keys": stolen}
    (tmp_path / "two").write_text(json.dumps(other))
    assert ring(tmp_path / "two").find(bearer(key)) is None


def test_changes_are_taken_without_a_restart(file: Path) -> None:
    first = add_key(file, "search", ["answer"], 5.0, 7)
    keys = ring(file)
    second = rotate_key(file, "search", overlap_s=3600)
    assert keys.check(bearer(first), "answer").slot == keys.check(bearer(second), "answer").slot
    assert keys.check(bearer(second), "answer")._replace(until=0) == keys.check(bearer(first), "answer")._replace(until=0)
    third = rotate_key(file, "search", overlap_s=0)
    assert [keys.find(bearer(key)) is None for key in (first, second, third)] == [True, True, False]
    other = add_key(file, "other", ["answer"])
    assert keys.find(bearer(other)) is not None
    assert revoke_key(file, "search") >= 1
    assert keys.find(bearer(third)) is None
    assert keys.reload_failures == 0


def test_the_file_is_looked_at_once_in_a_while(file: Path) -> None:
    now = 0.0
    add_key(file, "a", ["answer"])
    keys = KeyRing(file, look_every_s=1.0, clock=lambda: now)
    added = add_key(file, "b", ["answer"])
    now = 0.99
    assert keys.find(bearer(added)) is None
    now = 1.0
    assert keys.find(bearer(added)) is not None


@pytest.mark.parametrize("damage", ["", "{", "[]", '{"salt": "00"}', "gone", "open"])
def test_a_file_that_breaks_later_shuts_nobody_out(file: Path, damage: str) -> None:
    key = add_key(file, "search", ["answer"])
    keys = ring(file)
    if damage == "gone":
        file.unlink()
    else:
        file.write_text(damage if damage != "open" else file.read_text() + "\n")
        file.chmod(0o666 if damage == "open" else 0o600)
    assert [keys.check(bearer(key), "answer").name for _ in range(3)] == ["search"] * 3
    assert keys.reload_failures == 1
    with pytest.raises(ConfigError):
        KeyRing(file)
    if damage == "gone":
        file.touch()
    else:
        file.unlink()
        added = add_key(file, "mended", ["answer"])
        assert keys.find(bearer(added)) is not None


@pytest.mark.parametrize("mode", [0o602, 0o604, 0o620, 0o610])
def test_a_file_that_others_may_change_or_all_may_read_is_refused(file: Path, mode: int) -> None:
    add_key(file, "a", ["answer"])
    file.chmod(mode)
    with pytest.raises(ConfigError, match="its group, or read by everyone"):
        read_keys(file)
    file.chmod(0o440)
    assert read_keys(file).keys[0].name == "a"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root gives files away")
def test_a_file_of_another_user_is_refused(file: Path) -> None:
    add_key(file, "a", ["answer"])
    os.chown(file, 12345, -1)
    with pytest.raises(ConfigError, match="belongs to another user"):
        read_keys(file)


def test_a_name_is_used_once_and_slots_again(file: Path) -> None:
    add_key(file, "a", ["answer"])
    add_key(file, "b", ["answer"])
    with pytest.raises(ConfigError, match="a key of this name exists"):
        add_key(file, "a", ["answer"])
    revoke_key(file, "a")
    add_key(file, "c", ["answer"])
    assert {held.name: held.slot for held in read_keys(file).keys} == {"b": 2, "c": 1}
    for call in (lambda: revoke_key(file, "a"), lambda: rotate_key(file, "a", 0)):
        with pytest.raises(ConfigError, match="there is no key of this name"):
            call()


def test_as_many_keys_as_the_limiter_has_places(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api_keys, "MOST_KEYS", 3)
    add_key(file, "a", ["answer"])
    add_key(file, "b", ["answer"])
    with pytest.raises(ConfigError, match="no more fit"):
        add_key(file, "c", ["answer"])


@pytest.mark.parametrize("name, scopes", [("../x", ["answer"]), ("", ["answer"]), ("a", ["answr"]), ("a b", ["answer"])])
def test_wrong_names_and_scopes_are_errors(file: Path, name: str, scopes: list[str]) -> None:
    with pytest.raises(ConfigError):
        add_key(file, name, scopes)


def test_rates_are_read_with_their_unit() -> None:
    assert [parse_rate(text) for text in ("", "100/s", "6000/min", "36/h", "0.5/s")] == [0, 100, 100, 0.01, 0.5]
    for wrong in ("100", "100/day", "-1/s", "0/s", "x/s", "1e3/s", "100 /s"):
        with pytest.raises(ConfigError, match="this is no rate"):
            parse_rate(wrong)


def test_writers_at_once_lose_no_key(file: Path) -> None:
    made: list[str] = []
    threads = [threading.Thread(target=lambda n=n: made.append(add_key(file, f"k{n}", ["answer"]))) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(limit(30))
    keys = ring(file)
    assert sorted(keys.check(bearer(secret), "answer").name for secret in made) == sorted(f"k{n}" for n in range(12))
    assert len({held.slot for held in read_keys(file).keys}) == 12


def test_the_commands(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = ["--file", str(file)]
    main(["keys", "add", "search", *place, "--scopes", "answer,admin", "--rate", "100/s", "--burst", "200"])
    key = capsys.readouterr().out.strip()
    assert ring(file).check(bearer(key), "admin").burst == 200
    main(["keys", "list", *place])
    shown = capsys.readouterr().out
    assert "search" in shown
    assert "answer, admin" in shown
    assert key not in shown
    main(["keys", "rotate", "search", *place, "--overlap", "0", "--json"])
    new = json.loads(capsys.readouterr().out)["key"]
    assert (ring(file).find(bearer(key)), ring(file).check(bearer(new), "admin").name) == (None, "search")
    main(["keys", "list", *place, "--json"])
    assert {row["name"] for row in json.loads(capsys.readouterr().out)} == {"search"}
    main(["keys", "revoke", "search", *place])
    assert read_keys(file).keys == ()


def test_the_commands_say_what_is_wrong(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "headtail.cli", "keys", "list", "--file", str(tmp_path / "none")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=limit(60))
    assert done.returncode == 2
    assert "the file of API keys cannot be read" in done.stderr
    assert "headtail keys add NAME --file FILE" in done.stderr
