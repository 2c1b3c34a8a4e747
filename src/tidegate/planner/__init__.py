"""What to deploy: replicas by phase, GPU and tensor-parallel size, chosen by a program and proved by simulation."""
