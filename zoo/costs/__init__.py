"""What a model costs on a machine, from its card alone: work, time, memory. Imports no torch."""
