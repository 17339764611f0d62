"""What an agent keeps on disk: journal and ledger in SQLite, every secret value sealed."""
