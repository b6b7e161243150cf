"""What the scripts stand on: runtime, dataset, engine, inference, and fast, which only makes training faster."""
