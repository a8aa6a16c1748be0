"""hotbay.v1.ModelService: registering, listing, and the wishes that move models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hotbay.v1 import model_pb2

from daemon.control.actions.conductor import Conductor
from daemon.control.actions.images import Images
from daemon.control.actions.pulls import Pulls
from daemon.control.actions.routing import Router
from daemon.control.services import answers, requests, views
from daemon.control.state.failures import Failed
from daemon.control.state.operations import Operations
from daemon.control.state.records import Intent, Kind, Plan, Pulled, Result
from daemon.control.state.running import Handle, Outcome
from daemon.control.state.world import World


class ModelService:
    """The methods that work now; the server answers the others as not implemented."""

    def __init__(
        self,
        world: World,
        operations: Operations,
        conductor: Conductor,
        router: Router,
        images: Images,
        pulls: Pulls,
    ) -> None:
        self._world = world
        self._operations = operations
        self._conductor = conductor
        self._router = router
        self._images = images
        self._pulls = pulls

    async def RegisterModel(self, request: model_pb2.RegisterModelRequest) -> model_pb2.Model:
        await self._conductor.admit()
        registry, directory = self._world.registry, Path(request.directory)
        requests.required("name", request.name)
        requests.required("directory", request.directory)

        async def run(handle: Handle) -> Outcome:
            version = await registry.register(request.name, directory, request.version)
            put = registry.put(version)
            self._router.publish_soon()
            return Outcome(Result(version.key, "COLD"), (put,))

        if request.validate_only:
            version = await registry.register(request.name, directory, request.version)
            found = views.version(self._world, version)
            return model_pb2.Model(name=request.name, versions=[found])
        asked = requests.identity("RegisterModel", request)
        if await self._operations.replay(asked) is None:
            registry.check(request.name, directory, request.version)
        operation = await self._operations.begin(
            asked,
            Intent(Kind.REGISTER, incoming=request.name),
            Plan(),
            (f"model:{request.name}",),
            run,
        )
        operation = await self._operations.wait(operation.name, None)
        if operation.failure is not None:
            raise Failed(operation.failure)
        return views.model(self._world, request.name)

    async def PullModel(self, request: model_pb2.PullModelRequest) -> Any:
        requests.required("repository", request.repository)
        operation = await self._pulls.submit(
            requests.identity("PullModel", request),
            request.name,
            Pulled(request.repository, request.revision, token_file=request.token_file),
            validate_only=request.validate_only,
        )
        return answers.operation(operation)

    async def ListModels(
        self, request: model_pb2.ListModelsRequest
    ) -> model_pb2.ListModelsResponse:
        names, token = requests.page(
            self._world.registry.names(), str, request.page_size, request.page_token
        )
        models = [views.model(self._world, name) for name in names]
        return model_pb2.ListModelsResponse(models=models, next_page_token=token)

    async def GetModel(self, request: model_pb2.GetModelRequest) -> model_pb2.Model:
        requests.required("name", request.name)
        return views.model(self._world, self._world.registry.resolve(request.name).name)

    async def LoadModel(self, request: model_pb2.LoadModelRequest) -> Any:
        requests.required("model", request.model)
        if request.canary and request.forget_canary:
            raise requests.invalid("forget_canary", "canary and forget_canary exclude each other")
        intent = Intent(
            Kind.LOAD,
            partition=request.partition,
            incoming=request.model,
            standby=request.standby,
            queue=request.queue,
            canary=request.canary,
            forget_canary=request.forget_canary,
        )
        return await self._submit("LoadModel", request, intent)

    async def UnloadModel(self, request: model_pb2.UnloadModelRequest) -> Any:
        requests.required("model", request.model)
        intent = Intent(
            Kind.UNLOAD,
            outgoing=(request.model,),
            in_flight=requests.policy(request, self._world.config.scheduling),
            drain_timeout_s=self._drain_timeout_s(request),
            evict=request.evict,
        )
        return await self._submit("UnloadModel", request, intent)

    async def StageModel(self, request: model_pb2.StageModelRequest) -> Any:
        requests.required("model", request.model)
        if request.weights_bytes < 0 or request.layers < 0:
            raise requests.invalid("layers", "weights_bytes and layers must not be negative")
        if request.weights_bytes and request.layers:
            raise requests.invalid("layers", "give weights_bytes or layers, not both")
        intent = Intent(
            Kind.STAGE,
            partition=request.partition,
            incoming=request.model,
            stage_bytes=request.weights_bytes,
            stage_layers=request.layers,
        )
        return await self._submit("StageModel", request, intent)

    async def SwapModel(self, request: model_pb2.SwapModelRequest) -> Any:
        requests.required("outgoing", request.outgoing)
        requests.required("incoming", request.incoming)
        intent = Intent(
            Kind.SWAP,
            partition=request.partition,
            outgoing=(request.outgoing,),
            incoming=request.incoming,
            in_flight=requests.policy(request, self._world.config.scheduling),
            drain_timeout_s=self._drain_timeout_s(request),
            queue=request.queue,
        )
        return await self._submit("SwapModel", request, intent)

    async def DrainModel(self, request: model_pb2.DrainModelRequest) -> Any:
        requests.required("model", request.model)
        intent = Intent(
            Kind.DRAIN,
            outgoing=(request.model,),
            in_flight=requests.policy(request, self._world.config.scheduling),
            drain_timeout_s=self._drain_timeout_s(request),
        )
        return await self._submit("DrainModel", request, intent)

    async def ResumeModel(self, request: model_pb2.ResumeModelRequest) -> Any:
        requests.required("model", request.model)
        return await self._submit(
            "ResumeModel", request, Intent(Kind.RESUME, incoming=request.model)
        )

    async def PinModel(self, request: model_pb2.PinModelRequest) -> model_pb2.Model:
        await self._conductor.admit()
        requests.required("model", request.model)
        key = self._world.registry.resolve(request.model).key

        async def run(handle: Handle) -> Outcome:
            put = self._world.registry.pin(key, request.pinned)
            self._images.apply_pins()
            state = self._world.state(self._world.registry[key])[0]
            return Outcome(Result(key, state), (put,))

        if not request.validate_only:
            operation = await self._operations.begin(
                requests.identity("PinModel", request),
                Intent(Kind.PIN, incoming=key),
                Plan(),
                (f"pin:{key}",),
                run,
            )
            operation = await self._operations.wait(operation.name, None)
            if operation.failure is not None:
                raise Failed(operation.failure)
        return views.model(self._world, self._world.registry[key].name)

    async def _submit(self, method: str, request: Any, intent: Intent) -> Any:
        operation = await self._conductor.submit(
            requests.identity(method, request), intent, validate_only=request.validate_only
        )
        return answers.operation(operation)

    def _drain_timeout_s(self, request: Any) -> float:
        default_s = self._world.config.scheduling.drain_timeout_s
        return requests.timeout_s("drain_timeout", request, default_s)
