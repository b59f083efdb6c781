"""What a person meets: reports, the quickstart, evaluation of runs, the web demo and annotation."""
