"""The live driver: carries out what the machines ask for, in real time, on real devices."""
