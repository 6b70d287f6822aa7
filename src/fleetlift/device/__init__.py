"""The device agent: what firmware must do, as a library; the simulated fleet is built on it."""
