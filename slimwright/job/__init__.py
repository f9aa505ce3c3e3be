"""The job: forecast, memory cap, journal and resume, build, verify, ledger, publish."""
