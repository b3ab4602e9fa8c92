"""What the workflow needs around the library: sources, devices, tracking, reports and one module a step."""
