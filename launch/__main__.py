"""List the programs."""

from launch import PROGRAMS

for program in PROGRAMS:
    print(f"python -m {program.name:26} {program.summary}")
