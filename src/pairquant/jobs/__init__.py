"""The main jobs, a file each: quantize, evaluate, compare, bench, inspect, trace, tune."""
