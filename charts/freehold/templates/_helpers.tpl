{{/* Name of the release's objects. One release a cluster: the kinds and the agents' Leases are shared. */}}
{{- define "freehold.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 40 | trimSuffix "-" -}}
{{- else if contains "freehold" .Release.Name -}}
{{- .Release.Name | trunc 40 | trimSuffix "-" -}}
{{- else -}}
{{- printf "%s-freehold" (.Release.Name | trunc 31) -}}
{{- end -}}
{{- end }}

{{/* The namespace of all Leases, which operator and agents know by this name. */}}
{{- define "freehold.leaseNamespace" -}}freehold-system{{- end }}

{{- define "freehold.operator" -}}{{ include "freehold.fullname" . }}-operator{{- end }}
{{- define "freehold.nodeAgent" -}}{{ include "freehold.fullname" . }}-node-agent{{- end }}
{{- define "freehold.hostAgent" -}}{{ include "freehold.fullname" . }}-host-{{- end }}

{{/* Labels that select: they never change. */}}
{{- define "freehold.selector" -}}
app.kubernetes.io/name: freehold
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end }}

{{- define "freehold.labels" -}}
{{ include "freehold.selector" . }}
app.kubernetes.io/part-of: freehold
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version | replace "+" "_" }}
{{- end }}

{{/* (dict "root" $ "image" .Values.operator.image) */}}
{{- define "freehold.image" -}}
{{- $tag := .root.Values.image.tag | default .root.Chart.AppVersion -}}
{{- $name := .image.repository -}}
{{- if .root.Values.image.registry -}}{{- $name = printf "%s/%s" .root.Values.image.registry $name -}}{{- end -}}
{{- if .image.digest -}}{{ $name }}@{{ .image.digest }}{{- else -}}{{ $name }}:{{ $tag }}{{- end -}}
{{- end }}

{{- define "freehold.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end }}

{{- define "freehold.restrictedPod" -}}
runAsNonRoot: true
runAsUser: 65532
runAsGroup: 65532
fsGroup: 65532
seccompProfile:
  type: RuntimeDefault
{{- end }}

{{/* Who may look up names. */}}
{{- define "freehold.dnsEgress" -}}
- to:
    - namespaceSelector: {}
      podSelector:
        matchLabels: {k8s-app: kube-dns}
  ports:
    - {protocol: UDP, port: 53}
    - {protocol: TCP, port: 53}
{{- end }}

{{/* Addresses that are nobody's on the internet. A gateway to the outside that listens on one is not our matter. */}}
{{- define "freehold.privateNetworks" -}}
[10.0.0.0/8, 172.16.0.0/12, 192.168.0.0/16, 100.64.0.0/10, "fc00::/7"]
{{- end }}

{{/* What the cluster says of its API server, as JSON: {"slices": [{"cidrs": […], "ports": […]}]}. Empty where helm cannot ask.
     The Service's own address is with it: not every network translates it before it looks at the policies. */}}
{{- define "freehold.apiServerFound" -}}
{{- $found := list -}}
{{- with lookup "discovery.k8s.io/v1" "EndpointSlice" "default" "kubernetes" -}}
  {{- $cidrs := list -}}
  {{- range .endpoints -}}{{- range .addresses -}}
    {{- $cidrs = append $cidrs (printf "%s/%s" . (ternary "128" "32" (contains ":" .))) -}}
  {{- end -}}{{- end -}}
  {{- $ports := list -}}
  {{- range .ports -}}{{- $ports = append $ports (int .port) -}}{{- end -}}
  {{- if and $cidrs $ports -}}
    {{- $found = append $found (dict "cidrs" (uniq $cidrs | sortAlpha) "ports" $ports) -}}
    {{- with lookup "v1" "Service" "default" "kubernetes" -}}
      {{- $cidrs = list -}}
      {{- range .spec.clusterIPs -}}
        {{- $cidrs = append $cidrs (printf "%s/%s" . (ternary "128" "32" (contains ":" .))) -}}
      {{- end -}}
      {{- $ports = list -}}
      {{- range .spec.ports -}}{{- $ports = append $ports (int .port) -}}{{- end -}}
      {{- $found = append $found (dict "cidrs" $cidrs "ports" $ports) -}}
    {{- end -}}
  {{- end -}}
{{- end -}}
{{- dict "slices" $found | toJson -}}
{{- end }}

{{- define "freehold.apiServerEgress" -}}
{{- $server := .Values.networkPolicy.apiServer -}}
{{- $slices := (include "freehold.apiServerFound" . | fromJson).slices -}}
{{- $wide := not (or $server.cidrs $slices) -}}
{{- if $server.cidrs -}}
  {{- $slices = list (dict "cidrs" $server.cidrs "ports" $server.ports) -}}
{{- else if $wide -}}
  {{- $slices = list (dict "cidrs" (include "freehold.privateNetworks" . | fromYamlArray) "ports" $server.ports) -}}
{{- end -}}
# The API server{{ if $wide }}, somewhere in private networks: see docs/install.md{{ end }}.
{{- range $slices }}
- to:
    {{- range .cidrs }}
    - ipBlock: {cidr: {{ . | quote }}}
    {{- end }}
  ports:
    {{- range .ports }}
    - {protocol: TCP, port: {{ int . }}}
    {{- end }}
{{- end }}
{{- end }}

{{/* Networks of gateways that are no pods, as JSON: {"cidrs"}. */}}
{{- define "freehold.gatewayPeers" -}}
{{- $cidrs := .Values.networkPolicy.gatewayPeers.cidrs -}}
{{- $mixed := or .Values.hostAgents .Values.nodeAgent.hostNetwork -}}
{{- range .Values.nodeAgent.pools -}}{{- if and . .hostNetwork -}}{{- $mixed = true -}}{{- end -}}{{- end -}}
{{- if and (not $cidrs) $mixed -}}
  {{- $cidrs = include "freehold.privateNetworks" . | fromYamlArray -}}
{{- end -}}
{{- dict "cidrs" $cidrs | toJson -}}
{{- end }}

{{- define "freehold.gatewayPeersEgress" -}}
{{- with (include "freehold.gatewayPeers" . | fromJson).cidrs -}}
# Gateways that are no pods: on machines beside the cluster, or on machines' own addresses.
- to:
    {{- range . }}
    - ipBlock: {cidr: {{ . | quote }}}
    {{- end }}
  ports:
    {{- range $.Values.networkPolicy.gatewayPeers.ports }}
    - {protocol: TCP, port: {{ int . }}}
    {{- end }}
{{- end }}
{{- end }}
