"""PostgreSQL: schema migrations, one module of queries an area, the embedded server."""
