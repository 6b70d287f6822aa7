"""The legacy backend: a single TCP server with a proprietary protocol, and the side it is in a migration."""
