"""Who sends a request."""

from headtail.stages.serve.principal import ANYONE, admit_all


def test_an_open_server_admits_everyone_as_one_caller_that_may_only_ask() -> None:
    assert admit_all([(b"authorization", b"Bearer x")]) is ANYONE
    assert ANYONE.id == ""
    assert ANYONE.scopes == {"answer"}
