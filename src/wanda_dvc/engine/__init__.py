"""The engine: a checkpoint run block by block, and written with some weights replaced."""
