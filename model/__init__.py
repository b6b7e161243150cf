"""The networks: U2NET, U2NETP and their Mamba versions."""
