"""What a move of one tenant decides, without I/O: schema, closure, plan, steps."""
