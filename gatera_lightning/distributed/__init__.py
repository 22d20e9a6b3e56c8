"""Several ranks: sharding, launch checks and gathering."""
