"""What measures: clock, telemetry, host, canary, limits, memory, energy, machine, proof,
profiles, and a second clock on CUDA.

They know nothing of what they measure.
"""
