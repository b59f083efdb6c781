"""RoleScape-20's tasks: what is asked, how answers are measured, and with what uncertainty."""
