"""--offload: the denoiser waits in host memory while VAE and rewards work, and these while it does."""


def install(run, reward_networks: list):
    """Have run.model move its networks whenever it goes over from denoising to decoding, and back."""
    model = run.model
    groups = {"denoising": [model.denoiser], "scoring": [model.vae, model.image_encoder, *reward_networks]}
    active = None

    def use(group: str):
        nonlocal active
        if active == group:
            return
        for name, networks in groups.items():
            if name != group:
                move(networks, "cpu")  # first make room
        move(groups[group], model.device)
        active = group

    def move(networks: list, device):
        for network in networks:
            if network is not None:
                network.to(device)

    def with_networks(method, group: str):
        def call(*args, **kwargs):
            use(group)
            return method(*args, **kwargs)

        return call

    model.denoise = with_networks(model.denoise, "denoising")
    model.decode = with_networks(model.decode, "scoring")
