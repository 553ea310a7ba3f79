"""FSDP shards as verl and SkyRL write them: a file a rank."""
