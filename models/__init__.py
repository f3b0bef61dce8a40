"""The ground: memories, the operations on them, and the networks to compile and test on."""
