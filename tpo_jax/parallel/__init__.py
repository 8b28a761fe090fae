"""Where the program runs: device meshes, sharding rules by path, TPU topologies."""
