"""The control plane, sans I/O: it observes, decides, acts and journals for the gateway and the simulator."""
