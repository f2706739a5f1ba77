"""What is wrong with shards: every damage of a set found in one pass, and clean copies of what is whole.

Loads no torch. A shard without an error here is one that training indexes and reads without a reject.
"""
