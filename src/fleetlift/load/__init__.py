"""What puts load and faults on a running system: soak, and later capture, replay and the generator."""
