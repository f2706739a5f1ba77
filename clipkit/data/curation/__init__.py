"""Which samples to keep: rules, scores, duplicates, balance. Loads no torch.

Every job has the same three steps: a survey takes a few numbers of every sample, shard by shard and in
parallel; a decision is made from the numbers alone; the kept samples are copied, or only listed.
"""
