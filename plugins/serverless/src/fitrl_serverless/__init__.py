"""fitrl on another machine: the client of a training service, and a server of the same API."""
