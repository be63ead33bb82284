"""Files: what is written whole, arrays that grow shard by shard, and scores."""
