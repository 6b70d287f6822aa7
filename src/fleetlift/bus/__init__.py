"""NATS: connection, streams, the embedded server, the fast reader of the log."""
