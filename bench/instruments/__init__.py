"""What measures: clock, telemetry, host, canary, limits, memory, energy, machine, proof, profiles.

They know nothing of what they measure.
"""
