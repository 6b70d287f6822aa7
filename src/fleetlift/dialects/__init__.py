"""One file a cloud: translation between its topics, payloads, credentials and the core's messages."""
