"""What to deploy: replicas by phase, GPU and tensor-parallel size, proposed by a program, simulated."""
