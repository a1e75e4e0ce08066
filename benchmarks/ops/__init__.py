"""One module an op: its workloads, baselines and floor."""
