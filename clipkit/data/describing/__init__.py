"""What is in a set of shards: captions, images and duplicates in numbers and on a page. Loads no torch."""
