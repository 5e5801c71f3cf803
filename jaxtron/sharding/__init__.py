"""Where everything lies: the mesh, the two tables of logical axes, and what moves between layouts."""
