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

{{- define "freehold.apiServerEgress" -}}
- to:
    {{- range .Values.networkPolicy.apiServer.cidrs }}
    - ipBlock: {cidr: {{ . | quote }}}
    {{- end }}
  ports:
    {{- range .Values.networkPolicy.apiServer.ports }}
    - {protocol: TCP, port: {{ . }}}
    {{- end }}
{{- end }}
