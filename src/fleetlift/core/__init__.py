"""The domain, without I/O: pure functions, frozen structs, state machines as tables."""
