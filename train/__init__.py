"""What learns: the teacher, the student, the deployed files, and how each is measured."""
