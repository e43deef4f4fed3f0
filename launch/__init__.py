"""What starts: configuration, plan, pipeline, processes, report, command line. Imports no torch."""
