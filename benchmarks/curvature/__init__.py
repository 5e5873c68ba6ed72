"""Eigenvalues and traces of Hessians beside other libraries, and against dense Hessians."""
