"""The in-process client: head hits from a local copy of the snapshot, everything else from the server."""

from headtail.client.answer import CLIENT_REASONS, Answer, ClientError
from headtail.client.asynchronous import AsyncClient
from headtail.client.config import ClientConfig
from headtail.client.synchronous import Client

__all__ = ["CLIENT_REASONS", "Answer", "AsyncClient", "Client", "ClientConfig", "ClientError"]
