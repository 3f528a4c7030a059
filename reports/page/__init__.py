"""One self-contained page of everything saved."""
