"""The reproduction of Keskar et al. (2017): configurations, recorded results, and what they must not be taken for."""
