"""What each step of a transfer does to charon and the kernel, at both gateways and at a mobile node."""
