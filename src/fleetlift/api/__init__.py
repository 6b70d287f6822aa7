"""HTTP: the native API, server-sent events, metrics."""
