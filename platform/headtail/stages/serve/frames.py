"""Messages between front processes and students: frames of MessagePack, each after its length.

In and out: typed messages. The student opens the connection and sends Hello; the front sends AskMisses and Cancel; the student sends
Answers. A frame holds as many rows as wait at that moment. Knows nothing of sockets.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from headtail.stages.serve.answerer import RealtimeReply

MOST_BYTES = 16 << 20  # of a frame: a peer that announces more does not speak this protocol
_LENGTH = struct.Struct("<I")


class AskRow(NamedTuple):
    """One miss. `seconds`: how long the front still waits for it."""

    id: int
    query: str
    side_inputs: dict[str, list[str]]
    seconds: float


class AnswerRow(NamedTuple):
    """The outcome of one miss: a reply, or the reason (one of REASONS) why there is none."""

    id: int
    reply: RealtimeReply | None
    reason: str


class Hello(msgspec.Struct, tag="hello"):
    """Who connects: the release's student it stands for, the task it was started under, the model, the secret of a TCP link."""

    student: str
    task: str
    model: str = ""
    token: str = ""


class AskMisses(msgspec.Struct, tag="ask"):
    """Misses to answer."""

    rows: list[AskRow]


class Cancel(msgspec.Struct, tag="cancel"):
    """Misses that nobody waits for any more."""

    ids: list[int]


class Answers(msgspec.Struct, tag="answers"):
    """Answers, in the order in which they were made. `queue`: misses that this replica works on. Sent without rows as a heartbeat."""

    rows: list[AnswerRow]
    queue: int


Message = Hello | AskMisses | Cancel | Answers
_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Message).decode


class BadFrame(Exception):
    """The bytes are no frame of this protocol: close the connection."""


def encode_frame(message: Message) -> bytes:
    """A message as bytes for the connection."""
    body = _encode(message)
    return _LENGTH.pack(len(body)) + body


class FrameBuffer:
    """Bytes as they come in, cut into messages."""

    def __init__(self) -> None:
        self._held = bytearray()

    def feed(self, data: bytes) -> Iterator[Message]:
        """The messages that are whole now. BadFrame when there can be none."""
        held = self._held
        held += data
        start = 0
        try:
            while len(held) - start >= 4:
                (size,) = _LENGTH.unpack_from(held, start)
                if size > MOST_BYTES:
                    raise BadFrame(f"a frame of {size} bytes")
                if len(held) - start - 4 < size:
                    break
                body = bytes(held[start + 4 : start + 4 + size])
                start += 4 + size
                try:
                    yield _decode(body)
                except msgspec.MsgspecError as error:
                    raise BadFrame(str(error)) from None
        finally:
            del held[:start]
