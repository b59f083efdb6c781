"""What is known without running: compiled programs read, work and memory by formula; and the bench beside them."""
