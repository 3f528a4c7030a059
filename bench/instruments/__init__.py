"""What measures: clock, telemetry, limits, memory, energy, machine, proof, profiles.

They know nothing of what they measure.
"""
