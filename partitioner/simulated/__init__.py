"""The simulated node: NVML's C ABI over boards that exist only as data.

`node` holds the state and what is injected, `calls`, `mig_calls` and `health_calls` answer each
NVML function from it with the means of `abi`, `mig_changes` changes it by the driver's rules,
`trouble` says in words what is injected, `remembered` keeps how it is cut, `library` gives these
answers C entry points, and `install` puts them where the real library would be, so that the real
pynvml runs above. None of these starts a process or touches a device.

`mps_control` is a program that stands in for NVIDIA's of that kind: `mps_daemon` serves,
`mps_texts` speaks both protocols, `mps_state` has the rules, `mps_client` makes a process a client.
"""
